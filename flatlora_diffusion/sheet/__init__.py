"""Contact sheets: pictures with labels on one sheet, by Pillow alone."""
