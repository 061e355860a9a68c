"""What is done to the elements of one block: in numpy, which defines it, and compiled."""
