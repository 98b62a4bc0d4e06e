"""Other people's programs, faster: their samplers replaced, their networks wrapped; one module for each project."""
