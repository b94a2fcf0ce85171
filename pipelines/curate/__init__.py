"""Curation: what is kept of the collected records; every filter says why it drops one."""
