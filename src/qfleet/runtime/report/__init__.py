"""The report of one or several runs: one page for a browser, which needs no network.

`figures` chooses what is drawn and `facts` what is written; both return plain data. `page` puts that data, the styles,
the script and plotly.js into one file. The dashboard serves the same page and sends the same data again and again.
"""
