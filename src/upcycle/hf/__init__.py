"""What reaches into other libraries' insides, and the versions that were tested."""
