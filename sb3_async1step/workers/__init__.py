"""One thread of the paper, what it shares with the others, and the pools that run several."""
