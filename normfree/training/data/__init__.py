"""Images with labels: which there are, in what order, made ready how."""
