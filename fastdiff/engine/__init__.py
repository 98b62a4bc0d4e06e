"""Tables to images: noise, the row op and its executors, the loop."""
