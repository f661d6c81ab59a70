"""What the default run trains on, made on this machine from the Python standard library: see prepare.py."""
