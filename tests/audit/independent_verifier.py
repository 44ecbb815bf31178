"""Checks a closed segment with the standard library alone; imports nothing of safegen.

Usage: python -I independent_verifier.py SEGMENT KEY_HEX PROMPT...   Prints the number of records that hold a PROMPT.
"""

import hashlib
import hmac
import json
import re
import sys
import unicodedata
from pathlib import Path

segment, key, *prompts = sys.argv[1:]
wanted = {
    hmac.new(bytes.fromhex(key), unicodedata.normalize("NFC", text).encode(), hashlib.sha256).hexdigest()
    for text in prompts
}
data = Path(segment).read_bytes()
if not data.endswith(b"\n"):
    sys.exit("torn")
previous, found, last = hashlib.sha256(b"safegen.audit/1 genesis").hexdigest(), 0, {}
for number, line in enumerate(data[:-1].split(b"\n")):
    record = json.loads(line)
    # A line is canonical JSON, so cutting the member "hash" out of its bytes leaves what was hashed.
    body = re.sub(rb'"hash":"[0-9a-f]{64}",', b"", line, count=1)
    if (record["seq"], record["prev"]) != (number, previous) or hashlib.sha256(body).hexdigest() != record["hash"]:
        sys.exit(f"broken at seq {number}")
    found += record.get("prompt", {}).get("hmac") in wanted
    previous, last = record["hash"], record
if last.get("footer") != {"count": last["seq"], "head": last["prev"]}:
    sys.exit("no footer")
sys.stdout.write(f"{found}\n")
