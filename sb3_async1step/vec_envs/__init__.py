"""
VecEnvs: splitting and guarding them while workers step, one that replaces failed processes, and one for Atari in C++.
"""
