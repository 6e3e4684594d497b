#!/usr/bin/env bash
# Speaks the demo recording with espeak-ng (Debian package espeak-ng): 22.05 kHz, one channel, 16 bit.
#
#   ./make_speech.sh [speech.wav]
set -euo pipefail
out="${1:-$(dirname "$0")/speech.wav}"
espeak-ng -v en-gb -s 165 -p 52 -a 120 -w "$out" \
  "Hello. I am a drawing, and a computer made this voice."
