"""VecEnvs: splitting one among several workers, guarding it meanwhile, and one that emulates Atari's games in C++."""
