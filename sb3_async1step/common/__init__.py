"""What all algorithms share: the SB3 interface, and what it is made of."""
