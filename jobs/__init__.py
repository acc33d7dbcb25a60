"""Jobs: thin entry points for `python -m` and `ray job submit`."""
