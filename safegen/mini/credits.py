"""The credits of safegen-mini: whose art it learned from, and the notices that their licences ask for."""

from __future__ import annotations

from safegen.mini.art import PACKAGES


def credits_text() -> str:
    """Returns `CREDITS.md`."""
    return _CREDITS.format(packages="\n".join(f"- `{name}` {version}" for name, version in PACKAGES.items()))


_CREDITS = """# Credits

safegen-mini learned from openly licensed emoji art, fetched as npm packages at these versions:

{packages}

- Noto Emoji, © Google Inc., Apache License 2.0 (https://github.com/googlefonts/noto-emoji): the `noto` style.
- Fluent Emoji, © Microsoft Corporation, MIT License (https://github.com/microsoft/fluentui-emoji): the `clay` style (3D
  renders), `ink` and `blueprint` (high contrast) and `pixel` (flat, reduced to 16×16 squares).
- Twemoji, © Twitter, Inc. and other contributors, graphics licensed under CC-BY 4.0
  (https://creativecommons.org/licenses/by/4.0/, https://github.com/jdecked/twemoji): the `popart` style
  (on a pink ground).

The art was rasterised, scaled, placed on coloured grounds and, for some styles, recoloured or reduced to squares. None
of the named companies endorses this model.

## Noto Emoji: Apache License 2.0

Licensed under the Apache License, Version 2.0 (the "License"); you may not use these files except in compliance with
the License. You may obtain a copy of the License at https://www.apache.org/licenses/LICENSE-2.0 (the licence of safegen
itself, in its LICENSE file). Unless required by applicable law or agreed to in writing, software distributed under the
License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See
the License for the specific language governing permissions and limitations under the License.

## Fluent Emoji: MIT License

Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

## Twemoji: Creative Commons Attribution 4.0 International

Copyright 2019 Twitter, Inc. and other contributors. The graphics are licensed under CC-BY 4.0; its text is at
https://creativecommons.org/licenses/by/4.0/legalcode. They were changed as described above. The licensor offers them
as-is and makes no representations or warranties of any kind concerning them.
"""
