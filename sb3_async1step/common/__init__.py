"""What both algorithms share, in the order data flows."""
