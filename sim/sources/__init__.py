"""Profiles that are not measured here: data sheets, and published measurements."""
