"""What a person sees on standard output: one file for each command that has something to show."""
