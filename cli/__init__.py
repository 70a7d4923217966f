"""The command `dsv4`: argv in, words out.  Installed as the import package dsv4cli."""
