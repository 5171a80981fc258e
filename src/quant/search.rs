//! Searches for the scale (and offset) of a group that loses least, shared by the block formats.
