"""What the running program tells about itself; importing it changes nothing."""
