"""Files for Kubernetes, cron and systemd: a manifest and its plan in, text out. Pure: no Ray, no IO, no clock.

text         plain values with comments → YAML
sizing       the plan → how many workers, and pods of what size
sites        what a site must satisfy before anything is written
pods         pod templates: the Ray head, the workers, the submitter
rayjob       RayJob, RayCluster
schedules    CronJob, RayCronJob
timers       crontab, systemd
surroundings ConfigMap, ServiceAccount, PersistentVolumeClaim, NetworkPolicy
base         which of them make a kustomize base
"""
