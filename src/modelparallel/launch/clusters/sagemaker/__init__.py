"""Training jobs of Amazon SageMaker: a request as the cloud's own SDK sends it, sent by boto3.

The request is data (request.py, from the options of options.py, checked by checks.py); service.py is the only file that
speaks to the cloud, logs.py reads what the jobs print, and cluster.py puts them together for the frame of
`launch/clusters`.
"""
