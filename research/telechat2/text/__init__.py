"""Conversations and their text: what needs neither MindSpore nor MindFormers."""
