"""Ask a TeleChat2 model: research/telechat2/run_telechat_predict.py under the README's name.

    bash scripts/msrun_launcher.sh "python research/telechat2/infer/run_telechat_predict.py \\
        --yaml_file predict_telechat_7b_parallel.yaml --checkpoint_path TeleChat2-7B --input_txt text.txt" 2
"""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])  # run as a file from anywhere
if __name__ == "__main__":
    runpy.run_path(f"{sys.path[0]}/research/telechat2/common/environment.py")["main"](Path(__file__).name)

from research.telechat2.common.cli import run  # noqa: E402
from research.telechat2.infer.command import main  # noqa: E402

if __name__ == "__main__":
    run(main)
