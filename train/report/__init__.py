"""What a comparison of methods is made of: lines, pictures, times, tables, and the page that shows it, and runs."""
