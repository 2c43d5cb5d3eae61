"""Settings, their rules, and the one check of a YAML; needs neither MindSpore nor MindFormers."""
