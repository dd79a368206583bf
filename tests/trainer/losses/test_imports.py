import subprocess
import sys


def test_the_losses_alone_need_torch_and_no_kafka_or_web_framework() -> None:
    script = (
        "import sys, trainer.losses\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in "
        "{'kafka', 'fastapi', 'starlette', 'uvicorn', 'pydantic', 'structlog', 'service'}"
        " or m.startswith('trainer.') and not m.startswith('trainer.losses')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['trainer.compiled']"  # which says where libraries lie, and imports nothing
