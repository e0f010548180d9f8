"""`python -m meshbpf` is the `meshbpf` command."""

from meshbpf.cli.main import main

raise SystemExit(main())
