"""`upcycle demo`: the whole story on one machine, with nothing but what Python and this package bring."""
