"""What YAMLs name in ``auto_register``: MindFormers runs a copy of this file, so it only re-exports."""

from research.telechat2.run.registered import *
