{{- define "avatar.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "avatar.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "avatar.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Labels that pick the pods of the release; with `component`, those of one. Takes {root, component?}. */}}
{{- define "avatar.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{/* Labels of every object. Takes {root, component?}. */}}
{{- define "avatar.labels" -}}
{{ include "avatar.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: avatar
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* The checks that a schema cannot make. */}}
{{- define "avatar.validate" -}}
{{- $models := .Values.models -}}
{{- if and $models.existingClaim $models.hostPath -}}
{{- fail "models.existingClaim and models.hostPath are both set: the checkpoint lies in one place; set the other to \"\"" -}}
{{- end -}}
{{- if not (or $models.existingClaim $models.hostPath) -}}
{{- fail "models.existingClaim and models.hostPath are both empty: the stages need a checkpoint; set one of them" -}}
{{- end -}}
{{- if eq .Values.image.tag "latest" -}}
{{- fail "image.tag is latest: a restart could change the version; name the version to run" -}}
{{- end -}}
{{- if eq (int .Values.gateway.grpcPort) (int .Values.gateway.httpPort) -}}
{{- fail (printf "gateway.grpcPort and gateway.httpPort are both %d: they need a port each" (int .Values.gateway.grpcPort)) -}}
{{- end -}}
{{- $gateway := .Values.gateway -}}
{{- if and (gt (int $gateway.replicas) 1) (not (and $gateway.database.url (or $gateway.artifacts.url $gateway.data.existingClaim))) -}}
{{- fail (printf "gateway.replicas is %d: several gateways need gateway.database.url, and gateway.artifacts.url or gateway.data.existingClaim, a claim that all can write to" (int $gateway.replicas)) -}}
{{- end -}}
{{- $artifacts := $gateway.artifacts -}}
{{- if and (or $artifacts.endpoint $artifacts.plainHttp $artifacts.credentialsSecret.name) (not $artifacts.url) -}}
{{- fail "gateway.artifacts has an endpoint or credentials but its url is empty: there is no bucket that they are for" -}}
{{- end -}}
{{- if and $artifacts.plainHttp (not (hasPrefix "http://" $artifacts.endpoint)) -}}
{{- fail "gateway.artifacts.plainHttp is true but gateway.artifacts.endpoint is none of http://: it would have no effect" -}}
{{- end -}}
{{- if and $gateway.database.passwordSecret.name (not $gateway.database.url) -}}
{{- fail "gateway.database.passwordSecret is set but gateway.database.url is empty: there is no database that it is for" -}}
{{- end -}}
{{- if and $gateway.webhooks.allow (not $gateway.webhooks.secret.name) -}}
{{- fail "gateway.webhooks.allow is set but gateway.webhooks.secret is not: nobody would be called" -}}
{{- end -}}
{{- if and .Values.networkPolicy.gatewayFrom (not .Values.networkPolicy.enabled) -}}
{{- fail "networkPolicy.gatewayFrom is set but networkPolicy.enabled is false: the list would have no effect" -}}
{{- end -}}
{{- end -}}

{{/*
The pod of one component. Takes {root, component, args, ports, probePort, mounts, volumes, settings}:
`ports` maps names to numbers; `settings` has resources, nodeSelector, tolerations and affinity.
*/}}
{{- define "avatar.pod" -}}
{{- $values := .root.Values -}}
metadata:
  labels:
    {{- include "avatar.labels" . | nindent 4 }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "avatar.serviceAccountName" .root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add $values.drainSeconds 15 }}
  {{- with $values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  containers:
    - name: {{ .component }}
      image: {{ printf "%s/%s:%s" $values.image.repository .component (default .root.Chart.AppVersion $values.image.tag) | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      args:
        {{- range .args }}
        - {{ . | quote }}
        {{- end }}
        - "--log"
        - {{ $values.log.filter | quote }}
        - "--log-format"
        - {{ $values.log.format | quote }}
        - "--drain-timeout"
        - "{{ int $values.drainSeconds }}s"
      ports:
        {{- range $name, $port := .ports }}
        - name: {{ $name }}
          containerPort: {{ int $port }}
        {{- end }}
      startupProbe:
        grpc:
          port: {{ int .probePort }}
        periodSeconds: 2
        timeoutSeconds: 5
        failureThreshold: 60
      readinessProbe:
        grpc:
          port: {{ int .probePort }}
        periodSeconds: 5
        timeoutSeconds: 5
      livenessProbe:
        grpc:
          port: {{ int .probePort }}
        periodSeconds: 20
        timeoutSeconds: 10
        failureThreshold: 6
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
      resources:
        {{- toYaml .settings.resources | nindent 8 }}
      volumeMounts:
        - name: tmp
          mountPath: /tmp
        {{- toYaml .mounts | nindent 8 }}
  volumes:
    - name: tmp
      emptyDir: {}
    {{- toYaml .volumes | nindent 4 }}
  {{- with .settings.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .settings.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .settings.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
