"""What is wired, what is wrong with it and why, and the command to do it by hand."""
