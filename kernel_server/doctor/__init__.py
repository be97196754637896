"""What is wrong here, and how fast this machine moves bytes; looks and measures, changes nothing.

`findings` judges an installation and the way to a server, `bandwidth` measures the copies that
everything else is compared with.
"""
