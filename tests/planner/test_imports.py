"""The planner is imported without torch; import-linter does not see what the packages' own __init__ files load."""

import pkgutil
import subprocess
import sys

import src.planner


def test_no_module_of_the_planner_loads_torch() -> None:
    modules = [f"src.planner.{module.name}" for module in pkgutil.iter_modules(src.planner.__path__)]
    heavy = "{'torch', 'deepspeed', 'lightning', 'transformers', 'numpy'}"
    program = f"import sys, {', '.join(modules)}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.stdout.strip(), len(modules) > 10) == ("[]", True), result.stderr
