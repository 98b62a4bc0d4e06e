"""Other people's programs, faster: each module takes the place of one library's samplers."""
