"""Runs one probe, prints its finding as one line of JSON: `python -m mmssl.doctor NAME FOLDER`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from mmssl.doctor import ANSWER
from mmssl.doctor.probes import probe

if __name__ == "__main__":
    finding = probe(sys.argv[1], Path(sys.argv[2]))
    print(f"\n{ANSWER}{json.dumps(asdict(finding))}", flush=True)
