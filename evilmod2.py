open('/tmp/h/MARK','w')
x=dict
