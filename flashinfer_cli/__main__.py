"""`python -m flashinfer_cli` is `genai-run`."""

from flashinfer_cli.cli.main import main

main()
