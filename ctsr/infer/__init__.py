"""From a thick array to a thin one: streaming networks, cascade, projection, memory plan."""
