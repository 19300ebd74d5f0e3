"""`routing.json`, beside a checkpoint: what `inspect` saw of its routers. Its name and its format."""

FILE = "routing.json"
FORMAT = 1
