"""Other programs' files, written anew as ours. Each file here knows one program."""
