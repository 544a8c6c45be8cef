"""Evaluation and report must not pull in jax."""

import subprocess
import sys


def test_evaluation_and_report_import_no_jax():
    modules = ("evaluation.ranking", "evaluation.retrieval", "evaluation.zero_shot", "evaluation.table", "report")
    lines = [f"import clipa_fast.{module}" for module in modules]
    program = "\n".join(["import sys", *lines, "sys.exit('jax' in sys.modules or 'matplotlib.pyplot' in sys.modules)"])
    subprocess.run([sys.executable, "-c", program], check=True)
