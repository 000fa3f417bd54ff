{{- define "kvbank.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "kvbank.labels" -}}
app.kubernetes.io/name: kvbank
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "kvbank.image" -}}
{{- $repository := required "image.repository: the image that was built from docker/service.Dockerfile" .Values.image.repository -}}
{{- if .Values.image.digest -}}
{{ $repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ $repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- /* What a container needs to reach the store: services, and the upgrade of the tables. */ -}}
{{- define "kvbank.store" -}}
- name: KVBANK_DATA
  value: {{ required "store.data: postgresql://USER@HOST/DATABASE" .Values.store.data | quote }}
- name: KVBANK_OBJECTS
  value: {{ required "store.objects: s3://BUCKET/PREFIX" .Values.store.objects | quote }}
- name: PGPASSFILE
  value: /run/kvbank/pgpass
{{- with .Values.store.region }}
- name: AWS_REGION
  value: {{ . | quote }}
{{- end }}
{{- with .Values.store.endpoint }}
- name: AWS_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . }}
  valueFrom:
    secretKeyRef:
      name: {{ required "store.secret: a secret with pgpass" $.Values.store.secret }}
      key: {{ . }}
      optional: true
{{- end }}
{{- end -}}

{{- /* PostgreSQL's library refuses a file that others can read, and files of a secret cannot be the pod's user's own. */ -}}
{{- define "kvbank.pgpass" -}}
- name: pgpass
  image: {{ include "kvbank.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: ["/bin/sh", "-c", "install -m 0600 /store/pgpass /run/kvbank/pgpass"]
  securityContext: {{- include "kvbank.closed" . | nindent 4 }}
  resources:
    requests: { cpu: 10m, memory: 16Mi }
    limits: { memory: 64Mi }
  volumeMounts:
    - { name: store, mountPath: /store, readOnly: true }
    - { name: run, mountPath: /run/kvbank }
{{- end -}}

{{- define "kvbank.closed" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end -}}

{{- define "kvbank.unprivileged" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: { type: RuntimeDefault }
{{- end -}}
