"""The token viewer: one step's rollouts as coloured text in one HTML file that needs no network.

Start at `command.py`. The page itself is viewer.html, viewer.css and viewer.js, put together by `page.py`.
"""
