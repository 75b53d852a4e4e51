#!/bin/sh
# The root is found by its hash, not by root=.
if getarg pipeline.roothash= > /dev/null; then
    root=pipeline
    rootok=1
fi
