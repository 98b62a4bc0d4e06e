"""Pages about the samplers, made from measurements: a Markdown table and a plot."""
