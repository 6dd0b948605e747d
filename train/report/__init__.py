"""What a comparison of methods is made of: lines, times, tables."""
