"""TeleChat2 for MindFormers: see README.md; the rooms of this package are listed there under "Layout"."""
