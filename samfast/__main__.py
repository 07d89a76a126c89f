# SPDX-License-Identifier: Apache-2.0
from samfast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
