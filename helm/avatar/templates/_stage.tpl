{{/* Deployment and Service of one stage. Takes {root, component, settings}. */}}
{{- define "avatar.stage" -}}
{{- $root := .root -}}
{{- $models := $root.Values.models -}}
{{- $port := int .settings.port -}}
{{- $args := list
      "--listen" (printf "0.0.0.0:%d" $port)
      "--models" "/models"
      "--device" .settings.device
      "--pressure-percent" (printf "%d" (int $root.Values.pressurePercent))
      "--compute" .settings.compute
      "--queue" (printf "%d" (int .settings.queue)) -}}
{{- if eq .component "diffusion" }}{{ $args = concat $args (list "--weights" $models.weights) }}{{ end -}}
{{- with .settings.faceModel }}{{ $args = concat $args (list "--face-model" .) }}{{ end -}}
{{- $mount := dict "name" "models" "mountPath" "/models" "readOnly" true -}}
{{- with $models.subPath }}{{ $_ := set $mount "subPath" . }}{{ end -}}
{{- $volume := dict "name" "models" -}}
{{- if $models.existingClaim -}}
{{- $_ := set $volume "persistentVolumeClaim" (dict "claimName" $models.existingClaim "readOnly" true) -}}
{{- else -}}
{{- $_ := set $volume "hostPath" (dict "path" $models.hostPath "type" "Directory") -}}
{{- end -}}
{{- $pod := merge (dict
      "args" $args
      "ports" (dict "grpc" $port)
      "probePort" $port
      "mounts" (list $mount)
      "volumes" (list $volume)) . -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "avatar.fullname" $root }}-{{ .component }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "avatar.labels" . | nindent 4 }}
spec:
  replicas: 1
  selector:
    matchLabels:
      {{- include "avatar.selector" . | nindent 6 }}
  template:
    {{- include "avatar.pod" $pod | nindent 4 }}
---
apiVersion: v1
kind: Service
metadata:
  name: {{ include "avatar.fullname" $root }}-{{ .component }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "avatar.labels" . | nindent 4 }}
spec:
  type: ClusterIP
  selector:
    {{- include "avatar.selector" . | nindent 4 }}
  ports:
    - name: grpc
      port: {{ $port }}
      targetPort: grpc
      appProtocol: kubernetes.io/h2c
{{- end -}}
