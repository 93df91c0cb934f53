"""Programs for other environments than that of tfbig, of which they import nothing."""
