"""What may go wrong from outside, one subject a file: arguments, signals, numbers, worker processes, files."""
