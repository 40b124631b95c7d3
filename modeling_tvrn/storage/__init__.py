"""What is written to disk to be read again: whole or not at all, and checked for what it was made from."""
